"""Templates of the labelled set of `redact.py`: what nuclear and renewables documents look like.

``DEVELOPMENT`` was looked at while the detectors were written. ``SECOND``, ``THIRD`` and ``FOURTH``
were each written after the one before had been used up, measured once before anything was mended
(`docs/redaction.md` has those figures too), and then joined the development. A slot such as
``{mobile}`` is drawn by `redact_values.Values`; the slots of ``KINDS`` have to be found, all else
has to stay.
"""

UNANNOUNCED = "name, not announced"
"""Names that no label, title or column announces: beyond what is promised, and counted apart."""

KINDS = {
    "name": "name",
    "spaced_name": "name",
    "english_name": "name",
    "loose_name": UNANNOUNCED,
    "id_card": "id_card",
    "old_id_card": "id_card",
    "credit_code": "credit_code",
    "bank_card": "bank_card",
    "mobile": "mobile",
    "phone": "phone",
    "local_phone": "phone",
    "foreign_phone": "phone",
    "email": "email",
    "ip": "ip",
    "host": "ip",
    "mac": "mac",
    "passport": "passport",
    "plate": "licence_plate",
}
"""Kind of each slot that has to be found."""

LOOK_ALIKES = (
    "tag date setpoint figures order part book version digest place code wrong not_name job "
    "not_english_name"
).split()
"""Slots that must stay."""

DEVELOPMENT = (
    # Maintenance records and work orders.
    "工作票编号 {part}，工作负责人：{name}，工作班成员：{name}、{name}、{name}，许可人：{name}。",
    "{date}，{system}{tag}检修，监护人 {name}，操作人：{name}，联系电话：{mobile}。",
    "编制：{name}    校核：{name}    审核：{name}    批准：{name}",
    "编制：{spaced_name}  审核：{spaced_name}  批准：{not_name}",
    "编制：{department}　审核：{not_name}　批准：{not_name}",
    "缺陷描述：{tag} 出口压力 {setpoint}，低于定值 {setpoint}。"
    "报告人：{name}（{department}），手机{mobile}。",
    "经{department}审核批准后方可执行，负责编制安全措施的单位应在{date}前完成。",
    "{order}\n设备 {tag}，图号 {part}，执行标准 {book}。",
    "值班电话{phone}，值长{name}，传真：{phone}；夜间请拨{mobile}。",
    "内线电话：{local_phone}，应急热线 {phone}。",
    # Contact sheets.
    "| 姓名 | 部门 | 手机 | 邮箱 |\n|---|---|---|---|\n"
    "| {name} | {department} | {mobile} | {email} |\n"
    "| {name} | {department} | {mobile} | {email} |\n"
    "| {name} | {department} | {mobile} | {email} |",
    "序号\t姓名\t身份证号\t电话\n1\t{name}\t{id_card}\t{mobile}\n2\t{name}\t{id_card}\t{mobile}",
    "联系人：{name}\n电话：{phone}\n手机：{mobile}\n邮箱：{email}\n车牌：{plate}",
    "{name}先生，{department}，Tel:{mobile}，E-mail:{email}",
    "请与{name}工程师联系（{mobile}，{email}）。",
    "入厂人员：姓名 {name}，身份证号码{id_card}，车辆{plate}，手机号{mobile}。",
    "身份证：{id_card}，护照：{passport}，工资卡号 {bank_card}。",
    "第一代身份证号码：{old_id_card}。",
    "访客{name}女士（证件号{id_card}）于{date}入厂，随车 {plate}。",
    "Contact: {english_name}, Tel: {foreign_phone}, Email: {email}",
    "Prepared by: {english_name}\nReviewed by: {english_name}\nApproved by: {not_english_name}",
    "Attn: {english_name}, passport No. {passport}, mobile {mobile}.",
    "Mr. {english_name} visited the {tag} pump on {date}; the flow was {setpoint}.",
    # Contracts.
    "甲方：{company}\n统一社会信用代码：{credit_code}\n法定代表人：{name}\n开户行：中国银行\n账号：{bank_card}\n电话：{phone}",
    "乙方（{company}，{credit_code}）授权代表{name}，联系方式 {mobile}。",
    "合同号 {part}，金额 {setpoint}，汇款至 {bank_card}。",
    "供应商纳税人识别号：{credit_code}；开票电话 {phone}",
    # Minutes.
    "参会人员：{name}、{name}、{name}（{department}）、{name}\n主持人：{name}\n记录：{name}",
    "会议由{name}主持。审核：{not_name}。",
    "与会：{name}，{name}；缺席：{name}",
    # Information technology.
    "服务器 {ip} 的网卡 MAC 地址为 {mac}，管理员邮箱{email}。",
    "登录 http://{host}:8080/，DNS {ip}；{code}",
    "DCS 工程师站 IP：{ip}，MAC：{mac}，固件 {version}。",
    "ssh root@{ip} # {digest}",
    # Nothing to be found.
    "{version}规定，{system}运行压力不超过 {setpoint}，参见 {book}。",
    "{figures}\n{figures}\n{figures}",
    "零件 {part}，数量 {count}，{order}，校验 {digest}。",
    "{date} {tag} {setpoint} {tag} {setpoint}",
    "坐标 {place}，升级到 {version}，{code}",
    "见 {book}，{book}；{book}。",
    "记录号{wrong}，{digest}",
    "The {tag} valve was tested on {date} per {book}; reading {setpoint}. Serial {part}, {order}.",
    "Section {version} of {book}: {figures}",
    "Author: {not_english_name}. Contact: {not_english_name}. See {version}.",
    "负责人：{not_name}；联系人：{not_name}",
    "{job}应在{date}前提交报告，{job}和{job}审核，由{job}批准。",
    "值班{job}：{name}。{name}指出，{system}的{job}要负责{tag}。",
    "由{name}负责{tag}，{name}主任于{date}签字；请{name}处长审阅，联系{name}老师。",
    "| 编制 | {name} | 审核 | {name} | 日期 | {date} |",
)

SECOND = (
    "【设备异动单】{order}　发现人：{name}　联络手机 {mobile}　处理意见：{not_name}",
    "本次{system}大修由{name}担任项目经理，现场安全员为{name}，24 小时电话 {phone}。",
    "作业许可证签发人：{name}；签字日期：{date}；作业地点坐标 {place}。",
    "值长：{name}；机组长：{name}；隔离经理 {name}先生（{mobile}）",
    "拟稿：{spaced_name}　　会签：{spaced_name}　　签发：{not_name}",
    "设计：{name} | 校对：{name} | 审定：{name} | 图号：{part}",
    "验收结论：{not_name}。验收人：{name}，{date}；监理单位联系人{name}，{phone}。",
    "辐射防护培训签到表\n姓名\t单位\t身份证号码\t联系电话\n{name}\t{department}\t{id_card}\t{mobile}\n"
    "{name}\t{department}\t{id_card}\t{mobile}\n{name}\t{department}\t{id_card}\t{mobile}",
    "| 角色 | 姓名 | 邮件 | 座机 |\n| --- | --- | --- | --- |\n"
    "| 业主代表 | {name} | {email} | {phone} |\n"
    "| 监理 | {name} | {email} | {phone} |",
    "个人剂量计领用：{name}（{id_card}），归还{date}，剂量 {setpoint}",
    "持证人公民身份号码为{id_card}；原号码（一代证）身份证 {old_id_card}。",
    "出国团组：{name}，护照号码 {passport}，签证邮箱 {email}，紧急联系人：{name} {mobile}",
    "港澳通行证：{passport}；入境日期 {date}。",
    "司机{name}，车牌号{plate}，手机：{mobile}，拟于{date}运送 {part} 进厂。",
    "停车场登记：{plate}、{plate}；内部电话 {local_phone}。",
    "风电场升压站钥匙由{name}保管，有事致电{mobile}或{phone}。",
    "卖方：{company}（信用代码 {credit_code}）；收款账户：{bank_card}；"
    "财务电话：{phone}；邮箱 {email}",
    "发票抬头：{company}，税号 {credit_code}，开户行及账号：工商银行 {bank_card}",
    "质保金退还至银行卡{bank_card}，户名{name}。",
    "投标人 {company}，{credit_code}，授权代表：{name}（身份证{id_card}）。",
    "出席：{name}、{name}、{name}、{name}\n列席：{name}（{department}）\n纪要整理：{name}",
    "抄送：{name}；{name}；{department}",
    "汇报人：{name}。{system}{tag}阀门内漏，整改期限{date}，责任人：{name}。",
    "远程支持：{name}工程师，微信{mobile}，邮箱：{email}；堡垒机地址 {ip}。",
    "光伏逆变器网关 {ip}/24，采集器 {mac}，固件版本 {version}，{order}",
    "防火墙策略：源 {ip} 目的 {ip} 端口 502；网卡物理地址 {mac}",
    "Supervisor: {english_name} ({email}, {foreign_phone}); document {part}, {version}",
    "Checked by: {english_name}    Verified by: {english_name}    Issued by: {not_english_name}",
    "Dear Mr. {english_name}, please call {foreign_phone} or write to {email} about {tag}.",
    "Attendees: {english_name}, {english_name} and {english_name}; host {ip}, card {bank_card}.",
    "The plant manager Dr. {english_name} confirmed {setpoint} at {tag} on {date}.",
    "Card number {bank_card}, passport {passport}, phone {mobile}",
    # Nothing to be found.
    "{tag}定期试验：要求 {setpoint}，实测 {setpoint}，偏差 {setpoint}，结论：{not_name}。",
    "审批：{not_name}　复核：{not_name}　记录：{not_name}",
    "程序 {part} 第 {version} 版引用 {book} 与 {book}。",
    "测点数据\n{figures}\n{figures}\n{figures}\n{figures}",
    "备件清单：{part}，{part}，{part}；{order}；{order}",
    "文件校验值 {digest}，生成时间 {date}，{code}",
    "样品编号 {wrong}；{order}；经纬度 {place}",
    "Calibration: {setpoint}, {setpoint}, {figures}. Approved by: {not_english_name}",
    "{order} / {part} / {book} / {digest}",
    "根据{book}和{book}，{system}设计寿命{count}年，{version}给出了限值{setpoint}。",
    "主持人：{not_name}；作者：{not_name}；编写：{department}",
)

THIRD = (
    # Emergency preparedness and operation.
    "应急演习签到：总指挥 {name}，副总指挥：{name}，通讯员{name}（手机 {mobile}）。",
    "交接班记录\n交班值长：{name}　接班值长：{name}\n{system}运行正常，{tag} 流量 {setpoint}。",
    "{date} 主控室接到{department}{loose_name}电话，称 {tag} 漏水，已派{name}前往查看。",
    "现场见证：{name}；{date}；见证意见：{not_name}。联系 {phone}",
    "辐射工作许可证（RWP）申请单位：{department}；"
    "负责人 {name}；授权进入人员：{name}、{name}、{name}",
    "大修指挥部值班安排：{date}白班 {name}（{mobile}），夜班 {name}（{mobile}）",
    "隔离执行人：{name}\n隔离确认人：{name}\n隔离点：{tag}、{tag}",
    # Photovoltaics and wind.
    "光伏电站运维日志　记录人：{name}　天气晴　逆变器 {ip} 告警，{order}",
    "风机机位 {place}，业主现场代表{name}，吊装单位{company}，吊车 {plate}",
    "采集网关 MAC={mac}，IP={ip}，SN：{part}，{version}",
    # Personnel and training.
    "| 序号 | 学员姓名 | 证件号码 | 手机号码 | 成绩 |\n|:--:|:--|:--|:--|--:|\n"
    "| 1 | {name} | {id_card} | {mobile} | 合格 |\n| 2 | {name} | {id_card} | {mobile} | 合格 |",
    "关于{name}同志任职的通知：经研究，任命{name}为{department}副主任。",
    "体检人员\t身份证\t电话\n{name}\t{id_card}\t{mobile}\n{name}\t{id_card}\t{mobile}",
    "员工{name}，公民身份号码 {id_card}，工资账户 {bank_card}，住宅电话 {local_phone}。",
    "探亲登记：家属姓名 {name}，护照 {passport}，接站车辆{plate}，{date}到达",
    # Suppliers and contracts.
    "供应商资格评审表\n企业名称：{company}\n社会信用代码：{credit_code}\n"
    "法人代表：{name}\n"
    "业务联系人：{name}　{mobile}　{email}",
    "付款信息：户名 {company}，开户银行 建设银行，银行账号 {bank_card}，税号{credit_code}",
    "退款请打到本人卡上：{bank_card}，{loose_name}，谢谢！电话 {mobile}",
    "评标委员会成员：{name}（组长）、{name}、{name}，监督人：{name}",
    "招标咨询请致电 {phone} 或 {phone}，邮件 {email}。",
    # Letters and English papers.
    "此致\n敬礼\n{department} {loose_name}\n{date}\n电话：{phone}  传真：{phone}",
    "Best regards,\n{english_name}\nSenior Engineer\nTel.: {foreign_phone}\nE-mail: {email}",
    "Non-conformance report {part}. Reported by {english_name} on {date}; inspector: "
    "{english_name}.",
    "Witnessed by: {english_name}; accepted by: {not_english_name}; cell {foreign_phone}",
    "Ms. {english_name} ({email}) will replace Mr. {english_name} from {date}.",
    "Please wire to IBAN or card {bank_card}; contact person: {english_name}.",
    "Visitor: {english_name}, passport {passport}, host {name}, vehicle {plate}",
    "The gateway {ip} ({mac}) replaced {part} with {version}.",
    # Nothing to be found.
    "运行参数：{setpoint}、{setpoint}、{setpoint}；报警定值 {setpoint}；设备 {tag} {tag}。",
    "依据 {book}、{book} 编制，审批：{not_name}，校核：{not_name}。",
    "结论：{not_name}。原因：{not_name}。措施：{not_name}。",
    "{job}、{job}和{job}参加了{date}的会议，{job}主持。",
    "{figures}\n{figures}\n{figures}\n合计 {count} 项，{order}",
    "固件 {version}，散列 {digest}，时间 {date}，{code}",
    "Spare parts: {part}, {part}; {order}; drawing {part}; {book}.",
    "抽样坐标 {place}；样品 {wrong}；{digest}",
    "Responsible: {not_english_name}. Reviewed by: {not_english_name}. Refer to {version}, {book}.",
    "设备台账\t编码\t投运日期\n{tag}\t{part}\t{date}\n{tag}\t{part}\t{date}",
)

FOURTH = (
    "【设备缺陷单】填写人：{name}；缺陷设备 {tag}；处理单位{department}；消缺人员：{name}、{name}",
    "十、参加本次根本原因分析的人员有{loose_name}、{loose_name}，组长由{name}担任。",
    "受检单位陪同人：{name}（{mobile}）　检查组组长：{name}",
    "吊装指挥：{name}　司索工：{name}　吊车 {plate}　作业日期 {date}",
    "巡盘记录：{tag} {setpoint}，{tag} {setpoint}，无异常。主操纵员：{name}，副操纵员：{name}",
    "经手人：{name}　领料人：{name}　{order}　备件 {part}",
    "质量计划见证点 H：{name}（签字）　{date}　执行标准 {book}",
    "培训教员：{name}；受训人：{name}、{name}；考核结果：{not_name}",
    "| 岗位 | 姓名 | 联系电话 | 电子邮箱 |\n"
    "|---|---|---|---|\n| 站长 | {name} | {mobile} | {email} |\n"
    "| 值班员 | {name} | {mobile} | {email} |",
    "房间\t入住人\t身份证号\t车牌\n"
    "{count}01\t{name}\t{id_card}\t{plate}\n{count}02\t{name}\t{id_card}\t{plate}",
    "申诉人{name}，男，身份证号{id_card}，电话{mobile}，住宿舍 {count} 栋。",
    "会后{loose_name}留下与{department}讨论 {tag} 的问题。",
    "根据{name}主任的要求，{name}工程师于{date}更换了 {part}。",
    "叉车驾驶员：{name}，证号 {id_card}，紧急联系电话 {phone}",
    "报销人 {name}，开户行工行，卡号{bank_card}，手机 {mobile}",
    "买受人：{company}　统一代码 {credit_code}　"
    "委托代理人：{name}　电话：{phone}　账号：{bank_card}",
    "承包商{company}（{credit_code}）项目负责人{name}，邮箱{email}，传真{phone}。",
    "出差人员：{name}、{name}；护照号：{passport}、{passport}；邀请方电话 {foreign_phone}",
    "值班表：周一 {loose_name}，周二 {loose_name}；应急电话 {phone}，内线 {local_phone}",
    "摄像机 {ip}，物理地址 {mac}，管理员 {name}，口令请问 {email}",
    "数据库主机 {ip} 与 {ip} 之间网络中断，{date}恢复，{digest}",
    "Event report by {english_name}, shift supervisor: {english_name}; phone {foreign_phone}.",
    "Approved by: {english_name} on {date}. Originator: {not_english_name}.",
    "Kind regards,\n{english_name}\nMobile: {mobile}\nEmail: {email}",
    "Dr. {english_name} and Mrs. {english_name} inspected {tag}; passport {passport}; car {plate}.",
    # Nothing to be found.
    "{tag}、{tag} 切换试验合格，压力 {setpoint}，温度 {setpoint}，参照 {book} 第{version}。",
    "责任单位：{not_name}；签发：{not_name}；执行人：{not_name}；备注：{not_name}",
    "{job}负责审查，{job}负责批准；{department}人员应于{date}前完成整改。",
    "库存\t{figures}\n{figures}\n{order}\n{order}",
    "型号 {part}，出厂编号 {part}，{book}，版本 {version}",
    "哈希 {digest}；坐标 {place}；{code}；记录 {wrong}",
    "Inspector: {not_english_name}; contact: {not_english_name}; {order}; {part}; {figures}",
)
